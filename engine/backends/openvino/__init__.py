"""OpenVINO on the CPU, in float32, bfloat16 and int8."""
