-- What the timeline of an aggregate is made of: on main its own events; on another edition those of
-- main before the divergence, and its own from there on.
local FAR = 2 ^ 53 -- beyond every sequence: where an edition diverges that has not diverged

-- Returns where an edition has left main, or nil if it has not.
local function divergence_of(divergence)
  return tonumber(redis.call('GET', divergence))
end

-- Returns the parts of a timeline that hold the sequences from `first` up to `stop`, which is not
-- one of them. `main` is nil on main itself.
local function parts_of(events, main, diverges_at, first, stop)
  if not main then
    return { { events, first, stop } }
  end
  local parts = {}
  if first < diverges_at then
    parts[1] = { main, first, math.min(stop, diverges_at) }
  end
  if stop > diverges_at then
    parts[#parts + 1] = { events, math.max(first, diverges_at), stop }
  end
  return parts
end
