#!lua
-- Records that events were handled and appends events to their aggregate: both, or neither.
-- KEYS: due, position, lease; commits, roots, editions, domains (see keys.py); then what append.lua
--       has for one aggregate
-- ARGV: what ack.lua has; domain, edition, the channel on which to tell what was stored, or '' for
--       none; then what append.lua has for one aggregate, with options that have an 's'
-- Reply: {what ack.lua replies, what append.lua replies to an append that is stored, or was before},
--        also when this is the second arrival and all of it was done with the first;
--        {'refused', what else append.lua replies} when nothing was done; {'lost'} likewise, when the
--        lease is not the worker's own any more, or somebody else has moved the position
-- include: commit.lua
-- include: timeline.lua
-- include: diverge.lua
-- include: page.lua
-- include: claims.lua
-- include: ring.lua
-- include: positions.lua
-- include: leases.lua
local due, position, lease = KEYS[1], KEYS[2], KEYS[3]
local commits, roots, editions, domains = KEYS[4], KEYS[5], KEYS[6], KEYS[7]
local root, holder, through, id = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local following, is_again = ARGV[5], ARGV[6] == 'again'
local domain, edition, channel = ARGV[7], ARGV[8], ARGV[9]
local mark, aggregates = '', 1 -- a second arrival is told by the position
local key, place = 8, 10
local MOST_CLAIMS = 100 -- of one source, that are after the events that were handled
-- include: appending.lua
local events, _, expected, first, last, options, branch, trace = next_append()
local divergence, main = branch and branch.divergence, branch and branch.main
local moment = now_of_server()
-- include: at_once.lua
-- include: settling.lua
-- include: acking.lua

-- Returns what append.lua has answered to the first arrival, if there was one. The events are found
-- by their source, also when others work on the aggregate by now.
local function earlier_append()
  local own = id_of_first(first)
  for _, claimed in ipairs(find_claims(trace.claims, trace.source, through + 1, MOST_CLAIMS)) do
    local from, count = range_of(claimed)
    local sequence = find_event(events, own, from, from + count - 1)
    if sequence then
      return { 'ok', sequence }
    end
  end
  local claimed = trace.key and was_acked() and find_claims(trace.claims, trace.key, 0, 1)[1]
  if claimed then
    return { 'duplicate', range_of(claimed) }
  end
end

local function carry_out()
  if not is_still_held or (at >= through and not is_again) then
    local answer = earlier_append()
    if not answer then
      return { 'lost' }
    end
    return { is_still_held and 'ok' or 'more', answer }
  end
  redis.call('ZCARD', due) -- fails here, before the first write, if it is something else
  if branch and not diverged_at and expected and expected < next_sequence then
    -- It would diverge before events that the worker has leased as main's.
    return { 'refused', { 'conflict', next_sequence } }
  end
  local answer = append(events, root, expected, first, last, options, branch, trace)
  if answer[1] ~= 'ok' and answer[1] ~= 'duplicate' then
    return { 'refused', answer }
  end
  return { settle((end_of(events, divergence, main))), answer }
end

local reply = carry_out()
if trace.erasures and (not reply[2] or reply[2][1] ~= 'ok') then
  pcall(claim_nothing, trace)
end
ring(channel, domain, edition)
return reply
