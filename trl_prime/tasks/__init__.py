"""Built-in tasks: base models that are made on the spot, with problems and rewards to train them on."""
