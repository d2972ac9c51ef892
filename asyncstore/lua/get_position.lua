#!lua flags=no-writes
-- Tells how far a handler has come in an aggregate on another edition than main.
-- KEYS: position, divergence
-- Reply: the sequence as text, or nothing
-- include: timeline.lua
-- include: positions.lua
local position, divergence = KEYS[1], KEYS[2]

return position_of(redis.call('GET', position), divergence_of(divergence))
