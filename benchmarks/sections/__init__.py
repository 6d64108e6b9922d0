"""The report's sections: each measures one thing and holds it to its goals."""
