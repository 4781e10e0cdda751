"""The sub-commands of `spice-dist`: each file has `add` for the options and one function for the action."""
