"""Balance terms: pressure toward even load, one file each."""
