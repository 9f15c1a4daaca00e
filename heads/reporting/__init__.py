"""Pictures and the page of one run."""
