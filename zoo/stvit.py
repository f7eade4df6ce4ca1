from .stvit_swin import *
