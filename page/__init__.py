"""The server's side of the page.

``routes`` answers the page's requests. ``file_plan`` makes the plan of a transformer's file from its header,
``encoder_plan`` the plan of a text encoder's. ``answers`` makes JSON from a plan, ``reports`` keeps what runs have
shown, ``registered`` finds packages that have taken our nodes' names.
"""
