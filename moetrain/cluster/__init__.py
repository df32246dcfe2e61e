"""Jobs on a cluster: what one asks for, the batch file that keeps a run alive, and its submission."""
