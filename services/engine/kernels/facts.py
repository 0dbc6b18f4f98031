"""What is new in each step, as the kernels of recorded jobs find it: the places of words at one address (`Jobs.facts`).

Addresses of what ForwardBatch and the attention backend have, and the width of the block tables.
"""

TOKEN_IDS, POSITIONS, SLOTS, SINGLES, BLOCKS, TABLES, MAX_PAGES, NUM_FACTS = range(8)
