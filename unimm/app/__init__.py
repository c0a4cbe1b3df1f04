"""The page: drawing, editing, asking, thinking and chatting in a browser, as a client of the serving engine."""
