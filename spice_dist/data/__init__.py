"""From untrusted image files to batches: dataset -> sources -> ingest -> loaders -> augment.

`dataset.open_data` names the images, `ingest.ingest` reads each once in bounded children and leaves one verified
.beton, `loaders.open_images` serves batches or crops in exactly the order it is given, `augment.view_batches` makes
views of them. Each module loads torch, Pillow or FFCV only if it needs it.
"""
