"""The samplers that lessons from here on choose from, by name."""

from functools import partial

from lesson_01_ddpm.diffusion import ddpm_sample
from lesson_02_improved_ddpm.ddim import ddim_sample
from lesson_02_improved_ddpm.variational_bound import learned_range

SAMPLERS = {"ddpm": partial(ddpm_sample, log_variance=learned_range), "ddim": ddim_sample}
