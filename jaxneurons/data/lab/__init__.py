"""The lab model and the facts of its world; `python -m jaxneurons.lab.train` makes them."""
