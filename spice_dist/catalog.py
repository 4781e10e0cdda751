"""The names that commands, settings and run folders share. Imports nothing, so that `--help` and reports come at once.

What a stage does is said by its row in `stages.py`.
"""

# a list, not a tuple: the declared choices of the setting `method` are this object, and a test enters a method
METHODS = ["spice", "imc_swav", "scan", "fixmatch", "supervised"]
USING_LABELS = ("fixmatch", "supervised")  # baselines that learn from some true labels
PRETEXTS = ("moco", "byol", "imc_swav", "none")
STAGES2 = ("spice_self", "spice_graph")
STAGES3 = ("spice_semi", "spice_tune", "none")

# titles and explanations of the stages that leave curves, in the order of the report
TITLES = {
    "moco": ("MoCo", "Learns features: two views of an image should be close, other images far."),
    "byol": ("BYOL", "Learns features: from one view of an image, those of another view are predicted."),
    "spice_self": (
        "SPICE-Self",
        "Learns the clustering heads on frozen features from pseudo-labels around cluster centers.",
    ),
    "spice_graph": (
        "SPICE-Graph",
        "Learns heads from clusterings of the neighbour graph; their consensus is the result.",
    ),
    "spice_semi": ("SPICE-Semi", "Trains the whole network, from the reliable labels towards all images."),
    "spice_tune": ("SPICE, fine-tuned", "Trains the last blocks of the network on the reliable labels."),
    "imc_swav": ("IMC-SwAV", "Learns features and clusters together by predicting one view's code from another view."),
    "scan": ("SCAN", "Trains the whole network: an image and its nearest neighbours belong in the same cluster."),
    "self_label": ("SCAN, self-labelling", "Trains it on, from its own confident predictions to strong views of them."),
}
