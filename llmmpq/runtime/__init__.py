"""Run packed checkpoints: the linear module and the choice between kernel and reference."""
