"""Tasks and data sets that PRIME runs on."""
