"""From untrusted image files to batches: sources -> ingest -> ffcv_writer -> images.

`sources.open_source` names the images, `ingest.ingest` reads each once and leaves clean square uint8 pixels,
`ffcv_writer.write_beton` packs them, `images.open_images` serves batches in exactly the order it is given,
and `order` says which order that is. Each module loads torch, Pillow or FFCV only if it needs it.
"""
