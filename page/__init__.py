"""The server's side of the page: from a file's header to its plan (``file_plan``) and the
answer (``answers``); what runs have shown (``reports``); whose our nodes' names are (``registered``); ``routes`` is the
door.
"""
