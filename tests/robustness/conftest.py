"""A finished model that the command may write to."""

from tests.opened import model as model
from tests.opened import run as run
