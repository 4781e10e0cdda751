"""Scores of the SPICE paper (Niu, Shan and Wang, 2103.09382) on its data sets, training and test images together."""

SCORES = ("acc", "nmi_geometric", "ari")  # the paper's NMI is over the geometric mean
ROWS = {
    "cifar10": {"SPICE-Self": (0.838, 0.734, 0.705), "SPICE": (0.926, 0.865, 0.852)},
    "cifar100-20": {"SPICE-Self": (0.468, 0.448, 0.294), "SPICE": (0.538, 0.567, 0.387)},
    "stl10": {"SPICE-Self": (0.908, 0.817, 0.812), "SPICE": (0.938, 0.872, 0.870)},
    "imagenet-10": {"SPICE-Self": (0.921, 0.828, 0.836), "SPICE": (0.959, 0.902, 0.912)},
    "imagenet-dogs": {"SPICE-Self": (0.646, 0.572, 0.479), "SPICE": (0.675, 0.627, 0.526)},
    "tiny-imagenet": {"SPICE-Self": (0.305, 0.449, 0.161)},
}


def published(source: object) -> dict[str, dict[str, float]]:
    """Return the paper's rows for a named data set; none for others."""
    rows = ROWS.get(source, {}) if isinstance(source, str) else {}
    return {f"{name}, published": dict(zip(SCORES, values, strict=True)) for name, values in rows.items()}
