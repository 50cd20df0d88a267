"""DDP, FSDP2, DeepSpeed ZeRO and mixed precision. The only package that imports accelerate and deepspeed."""
