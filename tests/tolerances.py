"""How close is close enough, named once: every tolerance of the tests, with its reason."""

# runtime/noise.py
TORCH_NOISE = 1e-6  # absolute: float32 logarithm and cosine of two libraries, numbers up to 6

# runtime/schedule.py, runtime/samplers: against diffusers, whose tables are float32
NOISE_SCHEDULE = 1e-5  # relative: alphas_cumprod, a product of 1000 float32 numbers
SIGMAS = 5e-5  # relative: float32 leaves 1 - alphas_cumprod = 0.0008 at the first timestep
SAMPLER_SCALES = 1e-5  # relative: input scales and the starting scales of latents and noise
SAMPLER_STEP = 2e-5  # of the largest |x|: every step of a trajectory on a nonlinear model
SAMPLER_STEP_COSINE = 2e-4  # the same where float32 leaves 1 - beta = 0.001 four digits
SAMPLER_SCHEDULE = 1e-4  # the same along sigmas that diffusers computes and keeps in float32
SAMPLER_TIMESTEPS = 5e-3  # absolute: of a sigma, whose logarithm diffusers looks up in float32
SAMPLER_BELIEF = 1e-6  # of the largest |x|: float32 timesteps, looked up twice
SAMPLER_ORDER = 0.35  # how far the slope of an error may fall short of the published order
SAMPLER_EXACT = 1e-9  # of the largest |x|: float64 algebra alone, no other library

# export/unet.py, export/autoencoder.py, export/clip.py: against diffusers and transformers
PARITY_RTOL = 1e-5  # norm of the difference / norm of the reference: float32, other summing orders

# runtime/pipeline.py: whole pictures of 8 bits
PICTURE_PSNR_DB = 40  # against diffusers: float32 through every layer of three networks
BATCH_PSNR_DB = 60  # a picture alone and in a batch: the same network, other summing orders
SMALL_PICTURE_PSNR_DB = 70  # small models against diffusers: a few bytes that differ by one

# runtime/images.py
LOSSY_PSNR_DB = 25  # a small drawing with hard edges, written as JPEG or WebP and read again

# training/autoencoder.py
NORMALISED_LATENTS = 1e-4  # absolute: mean and deviation after float32 convolutions
NORMALISED_PIXELS = 1  # of 255: what lay on the edge of rounding may fall to the other side

# engine/adapters/lora.py, engine/adapters/adapter.py: against LyCORIS, PEFT and diffusers
ADAPTER_RTOL = 2e-6  # norm of the difference / norm of the reference: float32, other summing orders

# engine/checkpoints/weights.py and the formats below it
READERS_PEAK_BYTES = 2**29  # of a process that opens hostile files: half of the 1 GiB allowed

# tests/test_full_size_checkpoints.py: float32 engines against diffusers, float16 weights
CHECKPOINT_RTOL = 1e-4  # norm of the difference / norm of the reference

# runtime/conditioning.py
EMBEDDED_GUIDANCE = 5e-4  # absolute: diffusers has a float32 logarithm, and angles up to 19,000
