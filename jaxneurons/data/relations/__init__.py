"""Relations bundled with jaxneurons, in the format of LRE; see README.md of the folder above."""
