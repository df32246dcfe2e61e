"""What a rank's memory holds: ``ledger.py`` watches a step, ``dry.py`` runs one on tensors that have no memory."""
