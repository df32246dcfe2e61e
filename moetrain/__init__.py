"""moetrain: distributed Mixture-of-Experts pretraining in which every layout is the same training run."""

__version__ = "0.1.0"
