"""The source side: the page server, and the order in which it sends pages."""
