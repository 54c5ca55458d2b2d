"""Pages and terminal output that show what an implicit PRM sees, and how a run went."""
