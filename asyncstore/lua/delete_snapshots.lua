#!lua
-- Deletes all snapshots of an aggregate.
-- KEYS: newest, kept, recent (see keys.py)
-- Reply: {'ok'}
redis.call('UNLINK', KEYS[1], KEYS[2], KEYS[3])
return { 'ok' }
