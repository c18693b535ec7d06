"""A server of pictures: denoising steps of many requests, behind OpenAI's API and a native one.

What draws is in `runtime`; here is who may ask, in which order, and how it is told.
"""
