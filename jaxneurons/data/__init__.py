"""Data files bundled with jaxneurons; see README.md in this folder."""
