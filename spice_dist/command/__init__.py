"""The sub-commands of `spice-dist`, a file each with `add` for the options and one function for the action."""
