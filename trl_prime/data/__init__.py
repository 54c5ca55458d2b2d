"""Data sets, each row brought into the form that trainers and verifiers read."""
