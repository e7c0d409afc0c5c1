"""The server's side of the page.

``routes`` answers the page's requests. ``file_plan`` makes the plan of a file from its header, ``answers`` makes JSON
from the plan, ``reports`` keeps what runs have shown, ``registered`` finds packages that have taken our nodes' names.
"""
