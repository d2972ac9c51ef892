#!lua flags=no-writes
-- Tells the next sequence of an aggregate on another edition than main.
-- KEYS: events, divergence, the events of main
-- Reply: the sequence
-- include: timeline.lua
local events, divergence, main = KEYS[1], KEYS[2], KEYS[3]

local diverged_at = divergence_of(divergence)
return diverged_at and diverged_at + redis.call('ZCARD', events) or redis.call('ZCARD', main)
