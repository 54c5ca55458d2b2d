"""This room brings data sets into the form that trainers and verifiers read."""
