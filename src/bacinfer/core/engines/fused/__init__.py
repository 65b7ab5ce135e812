"""The denoising loop as one static program: compiled from schedule, model and scheduler, and run in one piece.

From the bottom: `sampler` (what the scheduler does), `denoiser` (what the model is), `buffers`, `instructions`,
`program` (which of them in which order), `native` and `cuda_graph` (ways to run them), `runners`, `recognition` and
`policy_watch` (what a program stands for, and whether it still does), `program_cache`, `engine`.
"""
