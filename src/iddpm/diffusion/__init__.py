"""The mathematics of diffusion, on tensors alone. Read it in this order: schedule, parametrization, denoiser, objective, solvers."""
