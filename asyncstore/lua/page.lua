-- Reads a page of events from parts of sorted sets.
local BYTES_A_PAGE = 1048576 -- about a millisecond of the server's time
local FIRST_CHUNK, LARGEST_CHUNK = 4, 32

local function chunk_of(events, start, stop, size, backwards)
  if backwards then
    return redis.call('ZRANGE', events, stop, start, 'BYSCORE', 'REV', 'LIMIT', 0, size)
  end
  return redis.call('ZRANGE', events, start, stop, 'BYSCORE', 'LIMIT', 0, size)
end

-- Puts members into `reply`, until `limit` of them are there, BYTES_A_PAGE have been looked at, or
-- the parts end. A part is {key, first sequence, the sequence after its last}; parts are in order.
-- Those for which `is_wanted` says no are passed over; nil for all.
-- reply[1] becomes the sequence to go on after, '' at the end. Returns how many bytes were read.
-- How large events are is found out on the way, a few first and then more each time: large ones
-- overshoot a page by a few. Who knows that they are small has a first chunk that is larger.
local function page(reply, parts, limit, backwards, is_wanted, first_chunk)
  local room, bytes, size = limit, 0, first_chunk or FIRST_CHUNK
  for number = 1, #parts do
    local part = parts[backwards and #parts + 1 - number or number]
    local events, start = part[1], string.format('%.0f', part[2])
    local stop = part[3] == math.huge and '+inf' or string.format('(%.0f', part[3])
    local is_over = false
    while not is_over do
      if not is_wanted then
        size = math.min(size, room)
      end
      local members = chunk_of(events, start, stop, size, backwards)
      for _, member in ipairs(members) do
        bytes = bytes + #member
        if room > 0 and (not is_wanted or is_wanted(member)) then
          reply[#reply + 1] = member
          room = room - 1
        end
      end
      if room == 0 then
        reply[1] = redis.call('ZSCORE', events, reply[#reply])
        return bytes
      end
      is_over = #members < size
      if #members > 0 and (not is_over or bytes >= BYTES_A_PAGE) then
        local last = redis.call('ZSCORE', events, members[#members])
        if bytes >= BYTES_A_PAGE then
          reply[1] = last
          return bytes
        end
        if backwards then
          stop = '(' .. last
        else
          start = '(' .. last
        end
      end
      size = math.min(4 * size, LARGEST_CHUNK)
    end
  end
  reply[1] = ''
  return bytes
end
