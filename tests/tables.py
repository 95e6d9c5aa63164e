"""What the tables of encoders and decoders have, for tests that go through all of it."""

from espnet.nets.decoders import DECODERS
from espnet.nets.encoders import TABLES

# Names of encoders and decoders that load a checkpoint; the tiny one's folder has the same name.
PRETRAINED = {
    name for table in (*TABLES.values(), DECODERS) for name, row in table.items() if row.pretrained
}
