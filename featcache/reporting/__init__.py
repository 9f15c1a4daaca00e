"""Parts of the report page: one file a section, and what they share."""
