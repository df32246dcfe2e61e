"""What a placement policy costs on a cluster that is not here, from loads that were recorded or made up."""
