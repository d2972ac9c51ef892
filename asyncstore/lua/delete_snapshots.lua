#!lua flags=allow-oom
-- Deletes all snapshots of an aggregate. Allowed when memory is full: it only deletes.
-- KEYS: newest, kept, recent (see keys.py)
-- Reply: {'ok'}
redis.call('UNLINK', KEYS[1], KEYS[2], KEYS[3])
return { 'ok' }
