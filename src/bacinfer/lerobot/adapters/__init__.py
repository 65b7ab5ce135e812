"""One file a family of policies: where its residual blocks and its denoising loop are."""
