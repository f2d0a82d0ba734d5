"""Every cell of a model: train an SAE on each and test it, on one machine or a cluster."""

from writesae_lens.sweep.run import Plan, Sweep, plan_sweep, sweep

__all__ = ["Plan", "Sweep", "plan_sweep", "sweep"]
