"""The server's side of the page: ``file_plan`` makes the plan from a file's header, ``routes`` answers the page."""
