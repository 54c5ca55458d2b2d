"""The value model of GAE: what is still to come, at every token, from both sources of reward."""
