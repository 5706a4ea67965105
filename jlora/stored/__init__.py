"""Codes: the forms in which base leaves can be kept, a file each."""

from jlora.stored.float8 import Float8 as Float8
from jlora.stored.fp4 import FP4 as FP4
from jlora.stored.int4 import Int4 as Int4
from jlora.stored.int8 import Int8 as Int8
from jlora.stored.normal_float import NF2 as NF2
from jlora.stored.normal_float import NF3 as NF3
from jlora.stored.normal_float import NF4 as NF4
from jlora.stored.uniform import Uniform as Uniform
