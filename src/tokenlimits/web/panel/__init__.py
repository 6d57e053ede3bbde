"""The admin panel: pages made on the server."""
