"""How close is close enough, named once: every tolerance of the tests, with its reason."""

# runtime/noise.py
TORCH_NOISE = 1e-6  # absolute: float32 logarithm and cosine of two libraries, numbers up to 6

# runtime/samplers/noise_schedule.py, runtime/samplers: against diffusers, whose tables are float32
NOISE_SCHEDULE = 1e-5  # relative: alphas_cumprod, a product of 1000 float32 numbers
SIGMAS = 5e-5  # relative: float32 leaves 1 - alphas_cumprod = 0.0008 at the first timestep
SAMPLER_SCALES = 1e-5  # relative: input scales and the starting scales of latents and noise
SAMPLER_STEP = 1e-5  # of the largest |x|: every step of a trajectory on a nonlinear model
SAMPLER_FLOAT32 = 1e-4  # the same where the float32 of diffusers' tables is what differs
SAMPLER_TIMESTEPS = 5e-3  # absolute: of a sigma, whose logarithm diffusers looks up in float32
SAMPLER_BELIEF = 1e-6  # of the largest |x|: float32 timesteps, looked up twice
SAMPLER_ORDER = 0.35  # how far the slope of an error may fall short of the published order
SAMPLER_EXACT = 1e-9  # of the largest |x|: float64 algebra alone, no other library

# export/modules: against diffusers and transformers
PARITY_RTOL = 1e-5  # norm of the difference / norm of the reference: float32, other summing orders

# runtime/pipeline.py: whole pictures of 8 bits
PICTURE_PSNR_DB = 40  # against diffusers: float32 through every layer of three networks
BATCH_PSNR_DB = 60  # a picture alone and in a batch: the same network, other summing orders
LATENTS_ATOL = 2e-3  # of the largest latent, after four steps beside diffusers' own
SMALL_PICTURE_PSNR_DB = 70  # small models against diffusers: a few bytes that differ by one

# runtime/images/files.py
LOSSY_PSNR_DB = 25  # a small drawing with hard edges, written as JPEG or WebP and read again

# training/autoencoder.py
NORMALISED_LATENTS = 1e-4  # absolute: mean and deviation after float32 convolutions
NORMALISED_PIXELS = 1  # of 255: what lay on the edge of rounding may fall to the other side

# engine/adapters/lora.py, engine/adapters/adapter.py: against LyCORIS, PEFT and diffusers
ADAPTER_RTOL = 2e-6  # norm of the difference / norm of the reference: float32, other summing orders

# engine/checkpoints/formats/files.py and the formats below it
READERS_PEAK_BYTES = 2**29  # of a process that opens hostile files: half of the 1 GiB allowed

# tests/test_full_size_checkpoints.py: float32 engines against diffusers, float16 weights
CHECKPOINT_RTOL = 1e-4  # norm of the difference / norm of the reference

# runtime/conditioning/encoder.py
EMBEDDED_GUIDANCE = 5e-4  # absolute: diffusers has a float32 logarithm, and angles up to 19,000

# runtime/philox.py
PHILOX_NOISE = 1e-6  # absolute: a GPU's float32 logarithm and fast sine, numbers up to 6
PRINTED_NOISE = 6e-5  # absolute: four decimals, as torch prints them

# runtime/images/canvas.py
FEATHER = 0.03  # of 1: Pillow's Gaussian is three boxes
GRAY_PIXEL = 0.5 / 127.5 + 1e-6  # of -1 to 1: bytes have no 127.5, diffusers' masked pixel

# runtime/images/upscaling.py
UPSCALED_LATENTS = 1e-6  # absolute: against torch in float64, rounded to float32
UPSCALED_LATENTS_FLOAT32 = 2e-5  # the same in float32, where torch rounds the places in between
# runtime/images/previews.py: linear previews against the decode at their size; its mean colour
# gives 12 dB
OWN_PREVIEW_PSNR_DB = 21  # fitted to the picture itself: 22 to 31
PROBE_PREVIEW_PSNR_DB = 13.5  # fitted to the probe, before there is a picture: 14 to 24
PREVIEW_PIXELS = 1  # of 255: a linear decoder's bytes are rounded before they are fitted
DENOISED = 2e-5  # of the largest |x|: float32, solved for the model's output
# export/modules/gpt2.py, runtime/expansion.py: against transformers
LOGITS_RTOL = 1e-5  # norm of the difference / norm of the reference: float32, other summing orders
TOKEN_PROBABILITY = 1e-6  # absolute: transformers' softmax of float32 logits
# runtime/images/tiles.py
TILED_SUM = 1e-6  # absolute: float32 weights of tiles, which sum to 1
TILED_PSNR_DB = 28  # tiles against the whole picture: each has its own statistics of norms
TILE_EDGE = 1.5  # steps between pixels at a tile's edge / those elsewhere in a smooth picture
TILED_LATENTS_RTOL = 0.2  # norm of the difference / norm of the reference: the same
TILED_NOISE = 0.95  # correlation of the noise in latents of tiles and of the whole picture
# benchmarks/flops.py
FLOPS_RTOL = 1e-4  # of torch's count, which leaves out the sampler's product
# benchmarks/distances.py
SSIM = 1e-9  # absolute: float64, running sums against every window
# engine/backends/openvino/engine.py: against ONNX Runtime in float32, of the model that ships
OPENVINO_RTOL = 1e-4  # norm of the difference / norm of the reference: other kernels and orders
OPENVINO_PSNR_DB = 60  # a picture; 86 to 88 dB measured
BFLOAT16_RTOL = 0.12  # random inputs, which guidance then multiplies; 0.095 at most
# engine/backends/openvino/winograd.py: where all convolutions, small ones too, are in tiles
TILES_BFLOAT16_RTOL = 0.22  # 0.201 measured, with both ends of the UNet in float32
BFLOAT16_PSNR_DB = 35  # a picture of 20 steps: 46 to 49 dB measured
# benchmarks/features.py
FEATURES_RTOL = 1e-4  # of float32 activations, against diffusers' encoder and cosines
# step_shallow: deep features kept between steps
REGIONS_ATOL = 2e-3  # of a step's output, up to some ten: texts one by one, and in one call
SHALLOW_RTOL = 1e-5  # of the registers: around its own deep features it does the same sums
CACHED_LATENTS_RTOL = 1e-4  # of a whole loop: against diffusers' UNet with the features kept
# engine/checkpoints/tiny_autoencoder.py, export/modules/tiny_autoencoder.py: against diffusers
TINY_PIXELS = 0.51  # of 255: rounding to bytes, and float32 in another order
# runtime/pipeline.py: previews by the tiny decoder that ships, against the full decode
TINY_PREVIEW_PSNR_DB = 22  # mean of eight pictures; 23.7 measured, the linear map has 19.7
# int8 of the UNet, against float32 of the model that ships
INT8_RTOL = 0.2  # norm of the difference / norm of the reference, of a step with guidance
INT8_PSNR_DB = 25  # a picture: 28 dB at least, 35 in the median of twenty
# engine/backends/onnxruntime/group_norm.py: against ONNX's own operator
GROUP_NORM_FLOAT16 = 2e-3  # of the largest: float16 rounds once more before SiLU, twice in it
# engine/backends/memory_estimate.py: against what TensorRT-RTX's builder plans
ESTIMATED_ACTIVATIONS = 0.2  # relative; UNets and decoders 0.02 to 0.11, shallow steps 0.19

# engine/backends/tensorrt/build.py: what an engine takes, per byte of its float16 weights
ENGINE_BYTES = 2.1  # on the disk: 1.01 measured, 2.03 where float16 weights are widened to float32
ENGINE_PEAK = 4.5  # of the child's memory: 3.4 measured
ENGINE_SPARE = 2**29  # bytes more of either: kernels, the library itself
# runtime/images/watermark.py: on drawn pictures of 128 to 512 pixels
WATERMARK_PSNR_DB = 41  # 41.8 to 46 measured
WATERMARK_BIT_ERROR = 0.05  # after JPEG 75, or halving: 0 measured in the mean and at most

# runtime/denoising/groups.py: the memory of 64 pictures over that of 4, measured as 1.02.
GROUPED_MEMORY = 1.5
# engine/graphs/upscalers.py: against the published architectures in torch, of the largest number
UPSCALER_RTOL = 1e-5
UPSCALER_SEAM = 2  # of 255: a gradient in tiles of 64, against the same in one
# engine/graphs/upsampler.py: against diffusers' UNet2DModel, of the largest number
UPSAMPLER_RTOL = 2e-5
# runtime/images/upsampling.py: what is drawn against diffusers' pipeline, of -1 to 1
UPSAMPLED_LATENTS = 1e-4
# engine/graphs/safety_checker.py: against diffusers' checker, of the largest number of an embedding
SAFETY_EMBEDDING = 1e-4  # its processor's normalisation is in float64
# engine/graphs/writer.py: small networks in other precisions, of the largest number
UPSCALER_FLOAT16 = 5e-3
UPSCALER_BFLOAT16 = 5e-2
