"""The mathematics of diffusion, on tensors alone; read schedule, parametrization, denoiser, objective, solvers, in this order."""
