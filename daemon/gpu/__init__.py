"""The GPU: what the driver says of it, and the lock that daemons of one machine share."""

from daemon.gpu.device import Gpu, bytes_needed, choose, devices, memory_hold

__all__ = ["Gpu", "bytes_needed", "choose", "devices", "memory_hold"]
